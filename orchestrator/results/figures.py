"""Which measured columns of the summary can be compared, and judged."""

FIGURES = (
    *("throughput_rps", "goodput_rps", "input_throughput_tok_per_s", "output_throughput_tok_per_s"),
    *(f"latency_{statistic}_ms" for statistic in ("mean", "p50", "p90", "p95", "p99", "p999")),
    *(f"{name}_{statistic}_ms" for name in ("ttft", "tpot") for statistic in ("mean", "p50", "p99")),
)
# At a level that is a request rate these say what was sent, and nothing about the service.
SET_BY_RATE = ("throughput_rps", "input_throughput_tok_per_s", "output_throughput_tok_per_s")
