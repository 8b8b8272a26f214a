// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The smallest object whose load needs the BTF of the kernel: the offset of `pid` is
 * relocated. counts[0]: tasks that ended, counts[1]: the pid of the last one.
 */
#include "counts.bpf.h"
#include <bpf/bpf_core_read.h>

struct task_struct {
	int pid;
} __attribute__((preserve_access_index));

COUNTS(2);

SEC("raw_tracepoint/sched_process_exit")
int on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	__u64 pid = BPF_CORE_READ(task, pid);
	__u32 key = 1;

	count(0);
	bpf_map_update_elem(&counts, &key, &pid, BPF_ANY);
	return 0;
}
