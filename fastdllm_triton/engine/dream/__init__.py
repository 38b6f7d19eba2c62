"""Dream's decoding: the arguments of its ``diffusion_generate``, its schedules, its result, and the loop for what the engine
has no strategy for.
"""
