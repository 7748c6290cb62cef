"""The evidence: every claim about speed, memory and accuracy, and the command that reproduces it.

    humanline bench                # or python -m bench, from a checkout: the quick suite
    humanline bench --help

| | |
|---|---|
| `cases.py`, `objectives.py` | what is run: objective × entry point × shape × dtype × active rows × head |
| `peers.py` | who runs it: humanline, the trainers' own code, other libraries, the bare floor |
| `accuracy.py`, `measure.py`, `run.py` | error against float64; then time and peak memory; in processes |
| `report.py`, `plots.py`, `readme.py` | results as a terminal table, as plots, as README.md's tables |
| `model.py` | time and memory predicted up to 1,024 GPUs, checked against what was measured |
| `traffic.py`, `compile_report.py` | bytes counted in the interpreter; what the compiler makes of it |
| `gpu.sh`, `gpu.py` | all of it on a bare GPU machine, one command |
| `test_speed.py` | the same cases under pytest-benchmark |
| `results/` | what was measured, as committed |
"""
