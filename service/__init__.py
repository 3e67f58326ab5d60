"""The server: generates images over REST with base models and students, and runs distillation jobs as processes."""
