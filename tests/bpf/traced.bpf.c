// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Functions of the kernel: cap_capable() as it is called and as it returns, by fentry, fexit and
 * kprobe. Only what the process `only` does is counted, and only CAP_SETPCAP.
 * counts[0]: calls, counts[1]: returns, counts[2]: calls by kprobe, counts[3]: returns by kprobe,
 * counts[4]: the last thing that was returned, plus one.
 */
#include "counts.bpf.h"
#include <linux/ptrace.h>
#include <bpf/bpf_tracing.h>

#define CAP_SETPCAP 8

COUNTS(5);

volatile const __u32 only = 0;

static __always_inline int is_ours(void)
{
	return bpf_get_current_pid_tgid() >> 32 == only;
}

/* The section names another function: what the policy says counts. */
SEC("fentry/vfs_read")
int BPF_PROG(on_call, const void *cred, void *namespace, int capability)
{
	if (is_ours() && capability == CAP_SETPCAP)
		count(0);
	return 0;
}

SEC("fexit")
int BPF_PROG(on_return, const void *cred, void *namespace, int capability, unsigned int options, int result)
{
	__u32 key = 4;
	__u64 value = result + 1;

	if (is_ours() && capability == CAP_SETPCAP) {
		bpf_map_update_elem(&counts, &key, &value, BPF_ANY);
		count(1);
	}
	return 0;
}

SEC("kprobe.multi")
int on_probe(struct pt_regs *ctx)
{
	if (is_ours() && PT_REGS_PARM3(ctx) == CAP_SETPCAP)
		count(2);
	return 0;
}

SEC("kretprobe.multi")
int on_probe_return(struct pt_regs *ctx)
{
	if (is_ours())
		count(3);
	return 0;
}
