"""What the unlearning benchmarks measure: TOFU's, MUSE's and WMDP's metrics, membership inference, fluency."""
