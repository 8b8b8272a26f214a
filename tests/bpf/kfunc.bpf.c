// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls two kernel functions (kfuncs), the harmless pair that every program type may call. */
#include "counts.bpf.h"

extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;

SEC("xdp")
int call_kfunc(struct xdp_md *ctx)
{
	bpf_rcu_read_lock();
	bpf_rcu_read_unlock();
	return XDP_PASS;
}
