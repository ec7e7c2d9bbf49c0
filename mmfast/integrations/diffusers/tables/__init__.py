"""diffusers' schedulers as tables: what each one's configuration, sigmas and timesteps mean.

One function per scheduler: it takes the scheduler, the index that its steps begin at, and the
options of the call, and gives a :class:`program.Program`. The tables are filled in float64 from the
numbers that the scheduler itself has set, so that what differs from it is only its rounding.
"""
