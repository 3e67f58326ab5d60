"""The server: draws over REST with base models and their students, and starts distillation jobs as processes."""
