"""Pipeline parallelism without changing a model: `strategy` holds the plugin, the other modules what it consists of.

Every stage runs the user's own forward. Parts of the model that belong to other stages do not compute: they return
what was received, or an `absent` tensor, which has a shape and no values. `trace` finds out on one example which
results of a stage later ones need, `split` decides where to cut, `run` is the forward of one stage, `wire` sends,
`flight` takes micro-batches forth and back, in the order of a `schedule`.
"""
