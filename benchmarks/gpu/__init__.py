"""What gpu_bench.py runs: a module for each stage, with ``run(context, sheet)``, and what starts and reports them."""
