"""The evidence: every claim about speed, memory and accuracy, and the command that reproduces it.

    humanline bench                # or python -m bench, from a checkout: the quick suite
    humanline bench --help

| | |
|---|---|
| `cases.py`, `objectives.py` | what is run: objective × entry point × shape × dtype × active rows |
| `peers.py` | who runs it: humanline, the trainers' own code, other libraries, the bare floor |
| `accuracy.py`, `measure.py`, `run.py` | error against float64; then memory, then time |
| `report.py`, `plots.py`, `readme.py` | as a terminal table, as plots, in README.md |
| `model.py` | time and memory predicted up to 1,024 GPUs, checked against what was measured |
| `traffic.py`, `compile_report.py` | bytes moved, counted; machine code, read |
| `gpu.sh`, `gpu/`, `card.py` | all of it on a bare GPU machine, one command |
| `test_speed.py` | the same cases under pytest-benchmark |
| `results/` | what was measured, as committed |
"""
