/*
 * The VDUSE user-space ABI, versions 0 and 1 (kernel: include/uapi/linux/vduse.h). This text is the only place where it is
 * written down: the C compiler evaluates it, and build.py feeds the same text to cffi. A test holds every
 * size, offset and request code against the kernel's own header.
 *
 * Fields that version 1 carved out of version 0's reserved space are here under their version 1 names; on a version 0
 * device they must be 0.
 */
#ifndef PYVDUSE_VDUSE_ABI_H
#define PYVDUSE_VDUSE_ABI_H

#include <stdint.h>
#include <sys/ioctl.h>

#define VDUSE_BASE 0x81
#define VDUSE_API_VERSION 0
#define VDUSE_API_VERSION_1 1
#define VDUSE_NAME_MAX 256
#define VDUSE_CONFIG_OFFSET 336

#define VDUSE_ACCESS_RO 1
#define VDUSE_ACCESS_WO 2
#define VDUSE_ACCESS_RW 3
#define VDUSE_IOVA_CAP_UMEM 1

#define VDUSE_GET_VQ_STATE 0
#define VDUSE_SET_STATUS 1
#define VDUSE_UPDATE_IOTLB 2
#define VDUSE_SET_VQ_GROUP_ASID 3

#define VDUSE_REQ_RESULT_OK 0
#define VDUSE_REQ_RESULT_FAILED 1
#endif

struct vduse_dev_config {
    char name[256];
    uint32_t vendor_id;
    uint32_t device_id;
    uint64_t features;
    uint32_t vq_num;
    uint32_t vq_align;
    uint32_t ngroups; /* v1 */
    uint32_t nas;     /* v1 */
    uint32_t reserved[11];
    uint32_t config_size;
    uint8_t config[];
};

struct vduse_vq_config {
    uint32_t index;
    uint16_t max_size;
    uint16_t reserved1;
    uint32_t group; /* v1 */
    uint16_t reserved2[10];
};

struct vduse_vq_state_split {
    uint16_t avail_index;
};

struct vduse_vq_state_packed {
    uint16_t last_avail_counter;
    uint16_t last_avail_idx;
    uint16_t last_used_counter;
    uint16_t last_used_idx;
};

struct vduse_vq_info {
    uint32_t index;
    uint32_t num;
    uint64_t desc_addr;
    uint64_t driver_addr;
    uint64_t device_addr;
    union {
        struct vduse_vq_state_split split;
        struct vduse_vq_state_packed packed;
    };
    uint8_t ready;
};

struct vduse_vq_eventfd {
    uint32_t index;
    int32_t fd;
};

struct vduse_config_data {
    uint32_t offset;
    uint32_t length;
    uint8_t buffer[];
};

struct vduse_iotlb_entry {
    uint64_t offset;
    uint64_t start;
    uint64_t last;
    uint8_t perm;
};

struct vduse_iotlb_entry_v2 { /* v1 */
    uint64_t offset;
    uint64_t start;
    uint64_t last;
    uint8_t perm;
    uint8_t padding[7];
    uint32_t asid;
    uint32_t reserved[11];
};

struct vduse_iova_umem {
    uint64_t uaddr;
    uint64_t iova;
    uint64_t size;
    uint32_t asid; /* v1 */
    uint32_t reserved[5];
};

struct vduse_iova_info {
    uint64_t start;
    uint64_t last;
    uint64_t capability;
    uint32_t asid; /* v1 */
    uint32_t reserved[5];
};

struct vduse_vq_state {
    uint32_t index;
    union {
        struct vduse_vq_state_split split;
        struct vduse_vq_state_packed packed;
    };
};

struct vduse_dev_status {
    uint8_t status;
};

struct vduse_iova_range {
    uint64_t start;
    uint64_t last;
};

struct vduse_iova_range_v2 { /* v1 */
    uint64_t start;
    uint64_t last;
    uint32_t asid;
    uint32_t padding;
};

struct vduse_vq_group_asid { /* v1 */
    uint32_t group;
    uint32_t asid;
};

struct vduse_dev_request {
    uint32_t type;
    uint32_t request_id;
    uint32_t reserved[4];
    union {
        struct vduse_vq_state vq_state;
        struct vduse_dev_status s;
        struct vduse_iova_range iova;
        struct vduse_iova_range_v2 iova_v2; /* v1; on v0 asid reads 0 */
        struct vduse_vq_group_asid vq_group_asid;
        uint32_t padding[32];
    };
};

struct vduse_dev_response {
    uint32_t request_id;
    uint32_t result;
    uint32_t reserved[4];
    union {
        struct vduse_vq_state vq_state;
        uint32_t padding[32];
    };
};

#ifndef PYVDUSE_VDUSE_IOCTLS_H
#define PYVDUSE_VDUSE_IOCTLS_H
/* on /dev/vduse/control */
#define VDUSE_GET_API_VERSION _IOR(VDUSE_BASE, 0x00, uint64_t)
#define VDUSE_SET_API_VERSION _IOW(VDUSE_BASE, 0x01, uint64_t)
#define VDUSE_CREATE_DEV _IOW(VDUSE_BASE, 0x02, struct vduse_dev_config)
#define VDUSE_DESTROY_DEV _IOW(VDUSE_BASE, 0x03, char[VDUSE_NAME_MAX])
/* on /dev/vduse/NAME */
#define VDUSE_IOTLB_GET_FD _IOWR(VDUSE_BASE, 0x10, struct vduse_iotlb_entry)
#define VDUSE_DEV_GET_FEATURES _IOR(VDUSE_BASE, 0x11, uint64_t)
#define VDUSE_DEV_SET_CONFIG _IOW(VDUSE_BASE, 0x12, struct vduse_config_data)
#define VDUSE_DEV_INJECT_CONFIG_IRQ _IO(VDUSE_BASE, 0x13)
#define VDUSE_VQ_SETUP _IOW(VDUSE_BASE, 0x14, struct vduse_vq_config)
#define VDUSE_VQ_GET_INFO _IOWR(VDUSE_BASE, 0x15, struct vduse_vq_info)
#define VDUSE_VQ_SETUP_KICKFD _IOW(VDUSE_BASE, 0x16, struct vduse_vq_eventfd)
#define VDUSE_VQ_INJECT_IRQ _IOW(VDUSE_BASE, 0x17, uint32_t)
#define VDUSE_IOTLB_REG_UMEM _IOW(VDUSE_BASE, 0x18, struct vduse_iova_umem)
#define VDUSE_IOTLB_DEREG_UMEM _IOW(VDUSE_BASE, 0x19, struct vduse_iova_umem)
#define VDUSE_IOTLB_GET_INFO _IOWR(VDUSE_BASE, 0x1a, struct vduse_iova_info)
#define VDUSE_IOTLB_GET_FD2 _IOWR(VDUSE_BASE, 0x1b, struct vduse_iotlb_entry_v2) /* v1 */
#endif
