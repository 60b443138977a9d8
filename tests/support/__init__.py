"""What several tests use: builders of small inputs, servers, label sets, readers written apart."""
