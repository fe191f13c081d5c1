"""Transfer of strategic behaviour from a large language model to a small one.

One flat module per step of the experiment, in the order in which data flows:
`errors`, `games`, `scenarios`, `prompts`, `answers`, `models`, `weights`, `sharing`,
`engines`, `ledger`, `stats`, `published`, `profiles`, `finetune`, `collect`, `readout`,
`alignment`, `contributions`, `plots`, `reproduce`, `status`, `costs`, `cli`. Nothing imports upward.
"""

__version__ = "0.1.0"
