"""Exports: a trained student as a folder for timm, an ONNX file, or a torch.export program, and its way to the Hub."""
