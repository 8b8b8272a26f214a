// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Reports every program that is started: one record per execve(2) that succeeded.
 *
 * The reader gets the records through a ring buffer. When it is full, new records are
 * lost, never old ones: a reader that lags misses what happens meanwhile.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define COMM_LEN 16 /* TASK_COMM_LEN of the kernel */

struct record {
	__u32 pid; /* thread group id, what ps calls PID, in the initial pid namespace */
	__u32 uid; /* real user id, in the initial user namespace */
	char comm[COMM_LEN];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024); /* bytes; a power of two and a multiple of the page size */
} events SEC(".maps");

/* Report this user only. Set before load; the policy says in which range. */
volatile const __u32 target_uid = 0xffffffff; /* everybody */

SEC("tracepoint/sched/sched_process_exec")
int on_exec(void *ctx)
{
	__u32 uid = bpf_get_current_uid_gid();
	struct record *record;

	if (target_uid != 0xffffffff && target_uid != uid)
		return 0;

	record = bpf_ringbuf_reserve(&events, sizeof(*record), 0);
	if (!record)
		return 0;
	record->pid = bpf_get_current_pid_tgid() >> 32;
	record->uid = uid;
	bpf_get_current_comm(record->comm, sizeof(record->comm));
	bpf_ringbuf_submit(record, 0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
