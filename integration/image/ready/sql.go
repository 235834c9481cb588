// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

package ready

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// maxPacket bounds what a database may send at a time.
const maxPacket = 1 << 20

// Postgres logs in without a password and wants a row for "select 1" (PostgreSQL's documentation, "Message Flow").
func Postgres(port int, user string) Check {
	return talk(port, func(conn net.Conn) error {
		var start bytes.Buffer
		start.Write([]byte{0, 3, 0, 0}) // protocol 3.0
		for _, s := range []string{"user", user, "database", "postgres", ""} {
			start.WriteString(s)
			start.WriteByte(0)
		}
		if err := writePostgres(conn, 0, start.Bytes()); err != nil {
			return err
		}
		asked, row := false, false
		for {
			kind, body, err := readPostgres(conn)
			if err != nil {
				return err
			}
			switch kind {
			case 'E':
				return fmt.Errorf("the database says %q", body)
			case 'R':
				if len(body) < 4 || binary.BigEndian.Uint32(body) != 0 {
					return errors.New("the database wants a password")
				}
			case 'D':
				row = true
			case 'Z':
				if asked {
					if !row {
						return errors.New("no row")
					}
					return nil
				}
				asked = true
				if err := writePostgres(conn, 'Q', []byte("select 1\x00")); err != nil {
					return err
				}
			}
		}
	})
}

// writePostgres sends a message; the first one of a connection has no kind.
func writePostgres(w io.Writer, kind byte, body []byte) error {
	var b []byte
	if kind != 0 {
		b = append(b, kind)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)+4))
	_, err := w.Write(append(b, body...))
	return err
}

func readPostgres(r io.Reader) (kind byte, body []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n < 4 || n > maxPacket {
		return 0, nil, fmt.Errorf("message of %d bytes", n)
	}
	body = make([]byte, n-4)
	_, err = io.ReadFull(r, body)
	return head[0], body, err
}

// Capabilities of a client of MySQL and MariaDB.
const (
	mysqlProtocol41 = 0x200
	mysqlSecure     = 0x8000
	mysqlPluginAuth = 0x80000
)

// MySQL logs in without a password and wants a result for "select 1" (MariaDB's documentation, "Connecting").
func MySQL(port int, user string) Check {
	return talk(port, func(conn net.Conn) error {
		number, greeting, err := readMySQL(conn)
		if err != nil {
			return err
		}
		if greeting[0] != 10 { // the protocol's version; an error is 0xff
			return fmt.Errorf("the database says %q", greeting)
		}
		login := binary.LittleEndian.AppendUint32(nil, mysqlProtocol41|mysqlSecure|mysqlPluginAuth)
		login = binary.LittleEndian.AppendUint32(login, maxPacket)
		login = append(login, 33) // utf8
		login = append(login, make([]byte, 23)...)
		login = append(login, user...)
		login = append(login, 0, 0) // end of the name, password of no length
		login = append(login, "mysql_native_password\x00"...)
		if err := writeMySQL(conn, number+1, login); err != nil {
			return err
		}
		number, answer, err := readMySQL(conn)
		if err == nil && answer[0] == 0xfe { // another way to log in is asked for: nothing is the answer to that too
			if err := writeMySQL(conn, number+1, nil); err != nil {
				return err
			}
			_, answer, err = readMySQL(conn)
		}
		if err != nil {
			return err
		}
		if answer[0] != 0 {
			return fmt.Errorf("the database says %q", answer)
		}
		if err := writeMySQL(conn, 0, []byte("\x03select 1")); err != nil {
			return err
		}
		if _, answer, err = readMySQL(conn); err != nil {
			return err
		}
		if len(answer) != 1 || answer[0] != 1 { // a result with one column
			return fmt.Errorf("the database says %q", answer)
		}
		return nil
	})
}

func writeMySQL(w io.Writer, number byte, body []byte) error {
	n := len(body)
	_, err := w.Write(append([]byte{byte(n), byte(n >> 8), byte(n >> 16), number}, body...))
	return err
}

// readMySQL reads a packet, which is never empty.
func readMySQL(r io.Reader) (number byte, body []byte, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := int(head[0]) | int(head[1])<<8 | int(head[2])<<16
	if n == 0 || n > maxPacket {
		return 0, nil, fmt.Errorf("packet of %d bytes", n)
	}
	body = make([]byte, n)
	_, err = io.ReadFull(r, body)
	return head[3], body, err
}
