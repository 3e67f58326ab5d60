"""Losses: pure functions of tensors, no modules and no configuration. All compute in float32 at least."""
