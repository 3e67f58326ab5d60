"""Distillation jobs: the job table, the supervisor that works on it, and the executors that run attempts."""
