// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls bpf_send_signal, a helper function that a policy has to allow by name. */
#include "counts.bpf.h"

#define HARMLESS 28 /* SIGWINCH, ignored by default */

SEC("tracepoint/sched/sched_process_exit")
int signal_self(void *ctx)
{
	bpf_send_signal(HARMLESS);
	return 0;
}
