// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Functions of an object: bpf_send_signal, which needs a grant, is called by some programs through them and by one not. */
#include "counts.bpf.h"

#define HARMLESS 28 /* SIGWINCH, ignored by default */

static __noinline int below(int number)
{
	return bpf_send_signal(number);
}

static __noinline int between(int number)
{
	return below(number) + 1;
}

static __noinline int innocent(int number)
{
	return bpf_get_smp_processor_id() + number;
}

static int callback(__u64 index, void *context)
{
	return below(HARMLESS);
}

SEC("raw_tp/sched_process_exit")
int by_call(void *ctx)
{
	return between(HARMLESS);
}

SEC("raw_tp/sched_process_exit")
int by_address(void *ctx)
{
	bpf_loop(1, callback, 0, 0);
	return 0;
}

SEC("raw_tp/sched_process_exit")
int not_at_all(void *ctx)
{
	return innocent(HARMLESS);
}
