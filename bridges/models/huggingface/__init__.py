"""Any Hugging Face decoder-only model: split into sublayers (`decompose.py`), which `adapter.py` runs one by one."""
