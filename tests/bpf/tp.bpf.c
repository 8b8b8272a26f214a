// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A classic tracepoint that writes {pid, uid} of every exec to a ring buffer of 64 KiB. */
#include "counts.bpf.h"

struct record {
	__u32 pid;
	__u32 uid;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 * 1024);
} events SEC(".maps");

SEC("tracepoint/sched/sched_process_exec")
int on_exec(void *ctx)
{
	struct record record = {
		.pid = bpf_get_current_pid_tgid() >> 32,
		.uid = bpf_get_current_uid_gid(),
	};

	bpf_ringbuf_output(&events, &record, sizeof(record), 0);
	return 0;
}
