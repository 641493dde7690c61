"""The four datasets as tasks of lm-evaluation-harness: docs/run_compressed.md says how."""
