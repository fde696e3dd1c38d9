"""Does a model learn as well with MSA as with dense attention? A study on one GPU: see docs/quality.md.

    python -m benchmarks.quality plan
    python -m benchmarks.quality train --arm msa --seed 0 --seconds 400 --out out/quality
    python -m benchmarks.quality speed --out out/quality
    python -m benchmarks.quality report --out out/quality

`--quick` makes everything tiny, for a CPU.
"""
