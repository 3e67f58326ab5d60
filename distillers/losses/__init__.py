"""Loss functions: pure functions of tensors, without modules or configuration. All compute in at least float32."""
