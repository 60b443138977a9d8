"""What stage 1 costs on this machine: measured rates, estimates."""
