// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Accounts what the processes of a cgroup send, the cgroups below it included.
 *
 * One slot per CPU, as in packet_counter. The length is that of the packet from its IP
 * header on: at this hook there is no link-layer header yet.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

struct traffic {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct traffic);
} egress SEC(".maps");

SEC("cgroup_skb/egress")
int count_egress(struct __sk_buff *skb)
{
	__u32 key = 0;
	struct traffic *traffic = bpf_map_lookup_elem(&egress, &key);

	if (traffic) {
		traffic->packets++;
		traffic->bytes += skb->len;
	}
	return 1; /* let it pass */
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
