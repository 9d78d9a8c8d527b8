"""The paper's losses on hybrid forward passes (`hybrid.py`), and what they are divided by (`normalizers.py`)."""
