"""Methods of the paper that the defaults do not use.

The rest of the package imports nothing from here. `ray_surgeon.factors.collector` loads a module by
name when a job asks for it.
"""
