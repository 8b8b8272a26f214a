// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A uprobe and a uretprobe. counts[0]: calls, counts[1]: the first argument of the last call,
 * counts[2]: returns, counts[3]: the last return value.
 */
#include "counts.bpf.h"
#include <linux/ptrace.h>
#include <bpf/bpf_tracing.h>

COUNTS(4);

static __always_inline void store(__u32 key, __u64 value)
{
	bpf_map_update_elem(&counts, &key, &value, BPF_ANY);
}

SEC("uprobe.multi")
int on_call(struct pt_regs *ctx)
{
	store(1, PT_REGS_PARM1(ctx));
	count(0);
	return 0;
}

SEC("uretprobe.multi")
int on_return(struct pt_regs *ctx)
{
	store(3, PT_REGS_RC(ctx));
	count(2);
	return 0;
}
