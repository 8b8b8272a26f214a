// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A raw tracepoint. counts[0]: threads that ended. */
#include "counts.bpf.h"

COUNTS(1);

SEC("raw_tracepoint/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	count(0);
	return 0;
}
