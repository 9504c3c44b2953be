"""The atlas: what every head of a model does, measured in one pass over data.

    atlas = regard.atlas(model, batches)
    atlas.table()                               # (tower, layer, head, metric, value, n)
    atlas.select("induction", top=0.1)          # heads for a plan
    atlas.save("atlas/")                        # JSON and safetensors

Weights are streamed tile by tile, so that no matrix of all weights is ever held.
"""
