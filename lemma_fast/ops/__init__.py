"""The fused operations' two tables, `reference` and `fused`: the same names, the same signatures.

Import the one you need: `from lemma_fast.ops import reference`. A model takes a table as `ops`; any
object with the six functions will do, so a table can be mixed.
"""
