"""summary.md"""
from pathlib import Path
def write_summary(folder): return Path(folder)/"summary.md"
