"""What a launch does on a host with GPUs besides its steps: which replica gets which GPU, and how an engine on one is ended.

The driver's calls are in checkpoint.cuda.
"""
