"""The theory, pure: schedules, parameterizations, guidance and samplers. Tensors in, tensors out.

Nothing is imported here on purpose: `weights.denoiser` needs `schedules`, and `guidance` needs `weights.denoiser`.
"""
