// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A classic tracepoint that writes {pid, uid} of every exec by the tests' user to a ring buffer of 64 KiB. */
#include "counts.bpf.h"

#define USER 12345 /* tests/src/user.rs: what other users of the machine do is none of our business */

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

	if (record.uid != USER)
		return 0;
	bpf_ringbuf_output(&events, &record, sizeof(record), 0);
	return 0;
}
