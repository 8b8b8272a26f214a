// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Calls a function of the kernel only on kernels that have it. */
#include "counts.bpf.h"

extern void bpf_rcu_read_lock(void) __ksym __weak;
extern void bpf_rcu_read_unlock(void) __ksym __weak;

SEC("xdp")
int call_weak(struct xdp_md *ctx)
{
	bpf_rcu_read_lock();
	bpf_rcu_read_unlock();
	return XDP_PASS;
}
