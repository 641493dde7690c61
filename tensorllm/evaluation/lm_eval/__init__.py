"""The four datasets as tasks of lm-evaluation-harness, as docs/run_compressed.md describes."""
