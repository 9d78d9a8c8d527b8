"""Any Hugging Face decoder-only model: taken apart (`decompose.py`) and run sublayer by sublayer (`adapter.py`)."""
