"""Transfer of strategic behaviour from a large language model to a small one.

One flat module per step of the experiment, in the order in which data flows:
`games`, `scenarios`, `prompts`, `answers`, `models`, `engines`, `ledger`, `collect`, `readout`,
`finetune`, `alignment`, `stats`, `plots`, `profiles`, `cli`. Nothing imports upward.
"""

__version__ = "0.1.0"
