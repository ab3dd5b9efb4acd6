"""lm-evaluation-harness on an artifact: `python -m build.tools.lm_eval ARTIFACT --tasks NAMES`."""
