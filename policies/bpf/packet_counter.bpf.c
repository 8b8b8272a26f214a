// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Counts what an interface receives and passes every packet on.
 *
 * One slot per CPU, so the program needs neither locks nor atomics; the reader adds the
 * slots up. The map is handed out frozen: user space reads it, only this program writes.
 *
 * The length comes from a helper function (Linux 5.18), because `data_end - data` is
 * arithmetic on pointers, which the verifier allows with CAP_PERFMON only.
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
} counters SEC(".maps");

SEC("xdp")
int count_packets(struct xdp_md *ctx)
{
	__u32 key = 0;
	struct traffic *traffic = bpf_map_lookup_elem(&counters, &key);

	if (traffic) {
		traffic->packets++;
		traffic->bytes += bpf_xdp_get_buff_len(ctx);
	}
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
