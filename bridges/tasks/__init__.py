"""The paper's twenty binary next-token tasks."""
