// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls bpf_trace_printk, which writes to a log that all of the machine shares. */
#include "counts.bpf.h"

SEC("tracepoint/sched/sched_process_exit")
int print_line(void *ctx)
{
	bpf_printk("bpfgate test");
	return 0;
}
