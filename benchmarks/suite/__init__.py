"""What benchmarks/gpu_suite.py is made of: its plan, its processes, its parts and its records."""
