// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package pack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/nhybrid/nhybrid/internal/erofs"
)

// viewVolume tells views from other images, and its last digit the version of
// what is expected of one.
const viewVolume = "nhybrid-view-1"

// The footer of a view is {magic, CRC-32C of the image, its size in bytes},
// little endian.
const (
	viewMagic      = "nhybview"
	viewFooterSize = len(viewMagic) + 4 + 8
)

func appendViewFooter(b []byte, size int64, crc uint32) []byte {
	b = append(b, viewMagic...)
	b = binary.LittleEndian.AppendUint32(b, crc)
	return binary.LittleEndian.AppendUint64(b, uint64(size))
}

// VerifyView checks that the file at path is a whole view: superblock, its
// checksum, footer and size. It does not read the rest. The error is of class
// errdefs.ErrDataLoss if the file is cut off or damaged,
// errdefs.ErrFailedPrecondition if another version wrote it,
// errdefs.ErrInvalidArgument if it is something else.
func VerifyView(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open view: %w", err)
	}
	defer f.Close()
	_, _, err = verifyView(f)
	return err
}

// VerifyViewDeep is [VerifyView], and reads all of the view to compare its
// checksum.
func VerifyViewDeep(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open view: %w", err)
	}
	defer f.Close()
	size, want, err := verifyView(f)
	if err != nil {
		return err
	}
	h := crc32.New(sumTable)
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
		return fmt.Errorf("read view %q: %w", path, err)
	}
	if h.Sum32() != want {
		return fmt.Errorf("view %q is damaged, its checksum does not match: %w", path, errdefs.ErrDataLoss)
	}
	return nil
}

// verifyView returns the size of the image and its checksum from the footer.
func verifyView(f *os.File) (size int64, crc uint32, err error) {
	path := f.Name()
	if size, err = erofs.CheckSuper(f, "view", viewVolume); err != nil {
		return 0, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		return 0, 0, fmt.Errorf("stat view %q: %w", path, err)
	}
	if want := size + int64(viewFooterSize); fi.Size() != want {
		return 0, 0, fmt.Errorf("view %q has %d bytes, its superblock says %d: %w", path, fi.Size(), want, errdefs.ErrDataLoss)
	}
	footer := make([]byte, viewFooterSize)
	if _, err := f.ReadAt(footer, size); err != nil {
		return 0, 0, fmt.Errorf("read footer of view %q: %w", path, err)
	}
	rest := footer[len(viewMagic):]
	if string(footer[:len(viewMagic)]) != viewMagic || binary.LittleEndian.Uint64(rest[4:]) != uint64(size) {
		return 0, 0, fmt.Errorf("view %q is damaged, its footer does not match: %w", path, errdefs.ErrDataLoss)
	}
	return size, binary.LittleEndian.Uint32(rest), nil
}

// deviceTagPrefix begins the tag of a device; the number of its layer follows.
const deviceTagPrefix = "nhybrid-layer-"

func deviceTag(layer uint64) string { return deviceTagPrefix + strconv.FormatUint(layer, 10) }

// ViewDevices returns the layers of the devices of the view at path, in order.
// Errors are those of [VerifyView].
func ViewDevices(path string) ([]uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open view: %w", err)
	}
	defer f.Close()
	return viewDevices(f)
}

func viewDevices(f *os.File) ([]uint64, error) {
	size, _, err := verifyView(f)
	if err != nil {
		return nil, err
	}
	tags, err := erofs.DeviceTags(f)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("the devices of view %q are beyond its %d bytes: %w", f.Name(), size, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, fmt.Errorf("read devices of view %q: %w", f.Name(), err)
	}
	layers := make([]uint64, len(tags))
	for i, tag := range tags {
		number, found := strings.CutPrefix(tag, deviceTagPrefix)
		if layers[i], err = strconv.ParseUint(number, 10, 64); err != nil || !found {
			return nil, fmt.Errorf("device %d of view %q is %q, which names no layer: %w", i+1, f.Name(), tag, errdefs.ErrDataLoss)
		}
	}
	return layers, nil
}
