# What libFuzzer says at the end of its logs, one line for each target. Edges: reached, and how many are there.

function line() {
  if (target) printf "%-14s %12d %10d %7d of %6d %8d\n", target, runs, speed, edges, all, inputs
}

BEGIN { printf "%-14s %12s %10s %17s %8s\n", "TARGET", "EXECUTIONS", "A SECOND", "EDGES", "INPUTS" }

FNR == 1 {
  line()
  runs = speed = edges = all = inputs = 0
  target = FILENAME
  gsub(/.*\/|\.log$/, "", target)
}

/^INFO: Loaded 1 modules/ { gsub(/[^0-9 ]/, ""); all = $2 }

/ cov: / {
  for (i = 1; i < NF; i++) {
    if ($i == "cov:") edges = $(i + 1)
    if ($i == "corp:") inputs = $(i + 1) + 0
  }
}

/^stat::number_of_executed_units/ { runs = $2 }
/^stat::average_exec_per_sec/ { speed = $2 }

END { line() }
