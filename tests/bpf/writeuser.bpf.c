// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls bpf_probe_write_user, which writes into the memory of the traced process. */
#include "counts.bpf.h"

SEC("tracepoint/sched/sched_process_exit")
int write_null(void *ctx)
{
	__u32 zero = 0;

	bpf_probe_write_user((void *)0, &zero, sizeof(zero)); /* fails by itself: address 0 */
	return 0;
}
