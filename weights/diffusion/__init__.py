"""Pure diffusion maths: schedules, parameterizations, guidance and samplers. Tensors in, tensors out.

Deliberately imports nothing, to avoid a cycle: `weights.denoiser` needs `schedules`, and `guidance` needs
`weights.denoiser`.
"""
