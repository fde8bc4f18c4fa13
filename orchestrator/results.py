"""Samples to one row of metrics (pure)."""

import pyarrow as pa

# One row a request, warm-up included. Time 0 is the start of the measurement window.
SAMPLES_SCHEMA = pa.schema(
    [
        ("sent_at_s", pa.float64()),  # actual send; negative = warm-up
        ("intended_at_s", pa.float64()),  # open loop only, else null
        ("latency_ms", pa.float64()),  # to the last byte
        ("ttft_ms", pa.float64()),  # streaming only, else null
        ("tpot_ms", pa.float64()),  # (latency - TTFT) / (tokens - 1); null below two tokens
        ("num_input_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),  # SSE chunks for the streaming workload
        ("ok", pa.bool_()),
        ("error", pa.string()),  # null when ok
        ("client_process", pa.int16()),
    ]
)
