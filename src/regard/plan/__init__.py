"""Plans: which heads of which layers do what instead, as versioned JSON, applied and undone.

    {"schema_version": 1,
     "steps": [{"treatment": "snapkv", "options": {"budget": 0.25}, "layers": "2-"},
               {"treatment": "stream", "options": {"recent": 256}, "kv_heads": "0,3"}]}

`"storage": {"backend": "fp8"}` beside the steps stores what layers hold in transformers' own
quantised layers (fp8, hqq, quanto), where no step evicts keys.

Steps act in their order: on inputs, scores, weights and output they compose; what a head's cache
keeps is decided by its last `keep` step alone. A step names attention modules by a glob (`modules`,
on their path with the layer number as `*`); without one it means the decoder's self-attention, or
every self-attention in a model that has no decoder. Layers and heads are counted from 0, negative
numbers from the end: `"all"`, `[0, 2]`, `"0-3,-1"`, `"2-"`. Unknown names, fields and versions are
errors, and so is a step that matches nothing.
"""

from regard.plan.record import Plan
from regard.plan.resolved import Resolved, signature
from regard.plan.step import PlanError, Signature, Step, Storage

__all__ = ["Plan", "PlanError", "Resolved", "Signature", "Step", "Storage", "signature"]
