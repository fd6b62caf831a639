"""What `mmfuse bench` measures or counts: a module for each suite, with its CASES and CHECKS, or `run(args)`."""
